// Stands in where the library is built without XGrammar.

#include "flash_mla/error.h"
#include "grammar/grammar.h"

namespace flash_mla::grammar {

struct Compiler::Impl {};

Compiler::Compiler(Vocabulary) {}
Compiler::~Compiler() = default;

std::shared_ptr<const Grammar> Compiler::compile(const TextFormat&) {
  throw Unsupported("the format of a text: this library was built without XGrammar (FLASH_MLA_XGRAMMAR)");
}

}  // namespace flash_mla::grammar
