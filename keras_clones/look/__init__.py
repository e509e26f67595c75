"""What a user looks at: tables, pictures, bytes, timelines.

In: devices, footprints, spans of time.
Out: text, HTML and picture files.
"""
