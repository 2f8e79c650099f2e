"""Loading weights from files and folders."""
