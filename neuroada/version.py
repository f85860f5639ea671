"""The package's version; CHANGELOG.md says what each one brought."""

__version__ = "0.2.0"
