"""Methods side by side on one task: the runs, what is measured of each, and the table and page that show it."""
