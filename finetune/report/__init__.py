"""What a run leaves to read: metrics, manifest, report.html."""
