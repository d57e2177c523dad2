"""Pictures: any reference becomes an upright RGB image, or a typed error."""
