"""What made the artefacts that the repository holds: adapters, banks of retrainings, tables, notebooks."""
