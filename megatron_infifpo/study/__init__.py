"""Does fusing help? A study in a small world, run through the program from end to end."""
