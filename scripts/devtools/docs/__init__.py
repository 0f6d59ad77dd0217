"""What is generated for the documentation: reference pages, the page on performance, images, the site.

Begin with `reference_pages`, or with `site`, which builds and checks the whole.
"""
