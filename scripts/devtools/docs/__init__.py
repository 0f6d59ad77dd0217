"""What is generated for the documentation. Begin with `reference_pages`, or with `site`, which builds all."""
