"""Features in, numbers out: measurements of a frozen network, one file each."""
