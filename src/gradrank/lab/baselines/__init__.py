"""What gradrank's methods are compared with: one file per baseline, one registry line each."""
