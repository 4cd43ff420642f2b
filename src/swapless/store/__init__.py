"""Where expert weights come from: the user's own checkpoint files, read by byte range past the page cache."""
