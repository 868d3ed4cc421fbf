"""Names of the shipped families' components, written out so that the registry is held to them."""

COMPONENTS = ("vision", "qllama_query", "qllama_text", "qllama_step")
OPTIONAL = ("qllama_itm",)
CHAT_COMPONENTS = ("vision_chat", "decoder_embed", "decoder")
QUERY_CHAT_COMPONENTS = ("vision_chat", "query_chat", "decoder_embed", "decoder")
