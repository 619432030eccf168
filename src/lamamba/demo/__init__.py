"""The command `lamamba demo`: a web page that samples images and shows what the network sees.

Only page.py and serving.py know Gradio.
"""
