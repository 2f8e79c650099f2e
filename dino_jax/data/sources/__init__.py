"""Sources of images: folders, records, datasets."""
