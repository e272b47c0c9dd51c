"""Training methods, a file each, listed in `table`. Importing one loads no torch: the control plane reads them too."""
