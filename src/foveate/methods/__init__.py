"""Methods: one file each. `foveate.registry` lists them; `base` says what one is."""
