"""The private APIs of Ray, torch and MLflow that this project uses: names that a release may change without notice.

Each module has a table PRIVATE_APIS: name -> (its use, the effect of its loss). tests/test_private.py checks that every
name still exists, and that no other file uses a private name. The modules import these names when they are used.
"""
