"""The command line: parser, jobs, and exit statuses."""
