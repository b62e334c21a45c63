"""Claims in, ratios out: every performance figure of the README comes from a command here."""
