"""Model hubs: a repository named by prefix and revision, found or brought to this machine whole. No paddle here."""
