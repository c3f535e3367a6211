"""One script for each figure, the tables and the report; shared/ is what they share."""
