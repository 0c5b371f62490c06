"""The configuration: its schema, how it is composed and read, and the objects that it names."""
