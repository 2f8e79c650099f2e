"""Features of images from a frozen backbone."""
