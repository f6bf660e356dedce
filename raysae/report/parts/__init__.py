"""Parts of pages: one file each, its template beside it. A study takes those that it needs and adds its own."""
