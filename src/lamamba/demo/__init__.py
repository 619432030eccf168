"""The command `lamamba demo`: a page that samples, and shows what the network sees.

`serving.py` serves `page.py`, and they alone know Gradio. `gate.py` refuses requests that the page does not send,
`uploads.py` keeps and decodes what visitors upload, `settings.py` checks what a visitor asks for, `previews.py` makes
the images and their previews, `gallery.py` shows them, `figures.py` draws the paths and windows, `receptive_field.py`
measures what a pixel sees.
"""
