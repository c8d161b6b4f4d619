"""The quickstart: real data from Debian packages, a miniature model, and a report."""
