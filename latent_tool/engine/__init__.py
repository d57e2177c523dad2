"""The engine: one question becomes one outcome; many questions share their passes."""
