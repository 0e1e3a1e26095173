"""What is verified of a data set and of a conversion."""
