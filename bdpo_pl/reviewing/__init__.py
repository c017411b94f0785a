"""The page for labelling answers and writing chosen responses: its rows, and its server on this machine."""
