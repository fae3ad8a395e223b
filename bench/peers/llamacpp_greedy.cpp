// Tokenize, and continue token ids by the most likely token, with llama.cpp's own library.
//
//     greedy MODEL.gguf COUNT < questions
//
// A question is a line: "text WORDS", where \n stands for a line end, is answered by its token ids;
// "ids 1 2 3" by COUNT pairs id:logit, each the most likely one after those before it. Attention is
// kept in 32 bits, so that what differs from another program is the weights' own arithmetic.
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "llama.h"

static void say_errors(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

static void tokenize(const llama_vocab * vocab, std::string text) {
    for (size_t place; (place = text.find("\\n")) != std::string::npos;) text.replace(place, 2, "\n");
    std::vector<llama_token> ids(text.size() + 16);
    ids.resize(llama_tokenize(vocab, text.data(), text.size(), ids.data(), ids.size(), true, true));
    for (llama_token id : ids) printf("%d ", id);
    printf("\n");
}

static bool answer(llama_context * context, int size, std::vector<llama_token> ids, int count) {
    llama_memory_clear(llama_get_memory(context), true);
    for (int step = 0; step < count; step++) {
        if (llama_decode(context, llama_batch_get_one(ids.data(), ids.size()))) return false;
        const float * logits = llama_get_logits_ith(context, -1);
        llama_token best = 0;
        for (int id = 1; id < size; id++) {
            if (logits[id] > logits[best]) best = id;
        }
        printf("%d:%.6f ", best, logits[best]);
        ids = {best};
    }
    printf("\n");
    return true;
}

int main(int argc, char ** argv) {
    if (argc != 3) return 2;
    llama_log_set(say_errors, nullptr);
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (model == nullptr) return 1;
    llama_context_params params = llama_context_default_params();
    params.n_ctx = 1024;
    params.n_threads = params.n_threads_batch = 1;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.type_k = params.type_v = GGML_TYPE_F32;
    llama_context * context = llama_init_from_model(model, params);
    if (context == nullptr) return 1;
    const llama_vocab * vocab = llama_model_get_vocab(model);
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream words(line);
        std::string kind;
        words >> kind;
        if (kind == "text") {
            tokenize(vocab, line.substr(5));
            continue;
        }
        std::vector<llama_token> ids;
        for (llama_token id; words >> id;) ids.push_back(id);
        if (!answer(context, llama_vocab_n_tokens(vocab), ids, atoi(argv[2]))) return 1;
    }
}
