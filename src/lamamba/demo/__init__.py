"""What a page that shows the network computes and draws: nothing here knows a browser.

`settings.py` checks what a visitor asks for, `painting.py` makes the images and their previews, `figures.py` draws the
paths and windows, `receptive_field.py` measures what a pixel sees.
"""
