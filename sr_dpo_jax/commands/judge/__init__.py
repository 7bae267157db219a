"""A judge model compares two files of answers: files in, requests to an endpoint, verdicts, shares with intervals."""
