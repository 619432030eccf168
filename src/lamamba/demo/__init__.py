"""The command `lamamba demo`: a web page that samples images and shows what the network sees.

serving.py          starts the server
page.py             the page; this file and serving.py are the only ones that know Gradio
gate.py             refuses requests that the page itself does not send
uploads.py          keeps and decodes uploaded images
settings.py         checks the settings of a request
previews.py         samples images, with previews
gallery.py          shows images as HTML
figures.py          draws the scan paths and the attention windows
receptive_field.py  measures which input pixels affect an output pixel
"""
