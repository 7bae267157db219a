"""From a preference file to this host's rows: rows -> tokens -> dataset -> plan -> pipeline, read in that order."""
