"""Pages and predictions that are calculated: nothing here measures."""
