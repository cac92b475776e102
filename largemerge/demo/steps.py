class Steps:
    pass
