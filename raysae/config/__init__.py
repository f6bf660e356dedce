"""What a user can say: sections, jobs, and how files and the command line become one."""
