"""One script for each figure, the tables and the report; shared/ has their common code."""
