"""What a person looks at: tables, files, pages, TensorBoard. Views of the same events."""
