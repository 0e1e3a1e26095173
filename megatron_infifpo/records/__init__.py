"""What users give: files of preference records in many forms, read into one plain form."""
