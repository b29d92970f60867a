"""Model parallel units: the rank grid, its groups, and the layers that are split over it."""
