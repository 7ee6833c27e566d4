"""Training of the dense heads: depth and normals, masks with their edges."""
