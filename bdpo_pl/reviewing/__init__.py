"""The page to label answers and to write chosen ones: its rows, and the server that shows them to this machine."""
