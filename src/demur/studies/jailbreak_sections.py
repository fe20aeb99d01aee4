def jailbreak_sections(result):
    return ()
