"""Video object segmentation on DAVIS 2017."""
