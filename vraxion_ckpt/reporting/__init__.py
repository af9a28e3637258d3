"""Draw a checkpoint as one HTML page that works offline, or as a PNG picture.

`report` has the public function. `gather` collects what is shown, with `similarity` for the experts. `drawing`,
`colours` and `words` turn it into shapes, colours and texts. `page`, `figures` and `experts_section` make the page with
Jinja2 and plotly, and `picture` makes the PNG with matplotlib.
"""
