#include "model_bindings.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "text/chat_template.h"
#include "text/tokenizer.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flash_mla::python {
namespace {

using text::ChatTemplate;
using text::StreamDecoder;
using text::TokenId;
using text::Tokenizer;

std::string_view view(const nb::bytes& text) { return {text.c_str(), text.size()}; }

nb::bytes to_bytes(std::string_view text) { return nb::bytes(text.data(), text.size()); }

std::vector<TokenId> encode(const Tokenizer& tokenizer, const nb::bytes& text, bool add_special_tokens,
                            bool allow_special) {
  const std::string_view bytes = view(text);  // immutable, and held by the caller
  const nb::gil_scoped_release release;
  return tokenizer.encode(bytes, add_special_tokens, allow_special);
}

std::string apply(const ChatTemplate& chat, const std::vector<std::pair<std::string, std::string>>& pairs,
                  bool add_generation_prompt) {
  std::vector<ChatMessage> messages;
  for (const auto& [role, content] : pairs) messages.push_back({role, content});
  return chat.apply(messages, add_generation_prompt);
}

/// `messages` and `variables` as JSON. Pairs of text and whether it is control.
std::vector<std::pair<std::string, bool>> render(const ChatTemplate& chat, const std::string& messages,
                                                 const std::string& variables, bool add_generation_prompt) {
  text::ChatInput input;
  input.messages = nlohmann::ordered_json::parse(messages);
  input.variables = nlohmann::ordered_json::parse(variables);
  input.add_generation_prompt = add_generation_prompt;
  std::vector<std::pair<std::string, bool>> out;
  for (text::TextPart& part : chat.parts(input)) out.emplace_back(std::move(part.text), part.control);
  return out;
}

}  // namespace

void bind_model(nb::module_& m) {
  nb::class_<Tokenizer>(m, "Tokenizer")
      .def_static(
          "open", [](const std::string& directory) { return Tokenizer::open(directory); }, "directory"_a)
      .def_static(
          "parse",
          [](const std::string& json, const std::string& origin) { return Tokenizer::parse(json, origin); },
          "json"_a, "origin"_a)
      .def_prop_ro("vocab_size", &Tokenizer::vocab_size)
      .def("encode", &encode, "text"_a, "add_special_tokens"_a, "allow_special"_a)
      .def(
          "decode",
          [](const Tokenizer& t, const std::vector<TokenId>& ids, bool skip) { return t.decode(ids, skip); },
          "ids"_a, "skip_special"_a)
      .def(
          "token_bytes", [](const Tokenizer& t, TokenId id) { return to_bytes(t.token_bytes(id)); }, "id"_a)
      .def("is_special", &Tokenizer::is_special, "id"_a)
      .def(
          "token_to_id", [](const Tokenizer& t, const std::string& token) { return t.token_to_id(token); },
          "token"_a)
      .def("id_to_token", &Tokenizer::id_to_token, "id"_a);
  nb::class_<StreamDecoder>(m, "StreamDecoder")
      .def(nb::init<const Tokenizer&, bool>(), "tokenizer"_a, "skip_special"_a, nb::keep_alive<1, 2>())
      .def("push", &StreamDecoder::push, "id"_a)
      .def("flush", &StreamDecoder::flush);
  nb::class_<ChatTemplate>(m, "ChatTemplate")
      .def_static(
          "open", [](const std::string& directory) { return ChatTemplate::open(directory); }, "directory"_a)
      .def_static(
          "parse",
          [](const std::string& jinja, const std::string& bos, const std::string& eos,
             const std::string& origin) { return ChatTemplate::parse(jinja, bos, eos, origin); },
          "jinja"_a, "bos_token"_a, "eos_token"_a, "origin"_a)
      .def("apply", &apply, "messages"_a, "add_generation_prompt"_a)
      .def("render", &render, "messages"_a, "variables"_a, "add_generation_prompt"_a);
}

}  // namespace flash_mla::python
