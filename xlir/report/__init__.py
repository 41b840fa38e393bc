"""The report of a run: one HTML file that opens offline.

`writer` puts the page together. `training`, `retrieval` and `tags` write its sections, from the
run's records and from `findings` about the embeddings of its test sets. `charts` draws, `markup`
escapes, and `page/` has the template, the style and the script.
"""
