"""One script per figure, and for the tables and the report; shared/ has what they share."""
