"""Tests of what readers see, in a real browser: the site and JupyterLab. `make test-browser`."""
