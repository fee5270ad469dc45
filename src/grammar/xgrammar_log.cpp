// Where XGrammar logs to. Compiled with it, for its own exception type.

#include "grammar/xgrammar_log.h"

#include <support/logging.h>

namespace flash_mla::grammar {
namespace {

thread_local std::vector<std::string>* collected = nullptr;

}  // namespace

Warnings::Warnings() { collected = &messages_; }
Warnings::~Warnings() { collected = nullptr; }

}  // namespace flash_mla::grammar

namespace xgrammar {

void LogFatalImpl(const std::string& file, int lineno, const std::string& message) {
  throw LogFatalError(file, lineno, message);
}

void LogMessageImpl(const std::string&, int, int level, const std::string& message) {
  // A client's grammar must not fill the log: what nobody collects is dropped.
  std::vector<std::string>* const out = flash_mla::grammar::collected;
  if (level >= XGRAMMAR_LOG_LEVEL_WARNING && out != nullptr) out->push_back(message);
}

}  // namespace xgrammar
