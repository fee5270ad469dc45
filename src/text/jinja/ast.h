#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "text/jinja/builtins.h"
#include "text/jinja/value.h"

namespace flash_mla::text::jinja {

/// A variable's name, by its place in Program::names.
using Symbol = int;

enum class Operator {
  kAdd,
  kSubtract,
  kMultiply,
  kDivide,
  kFloorDivide,
  kModulo,
  kEqual,
  kNotEqual,
  kLess,
  kLessEqual,
  kGreater,
  kGreaterEqual,
  kIn,
  kNotIn
};

struct Expression {
  enum class Kind {
    kConstant,     ///< value
    kName,         ///< symbol
    kList,         ///< operands
    kTuple,        ///< operands
    kDict,         ///< operands: key, value, key, value, ...
    kField,        ///< operands[0].name
    kItem,         ///< operands[0][operands[1]]
    kSlice,        ///< operands[0][operands[1]:operands[2]:operands[3]], each of which may be null
    kCallMacro,    ///< the macro called `symbol`, with operands and named
    kCallBuiltin,  ///< the function `builtin`, with operands and named
    kCallMethod,   ///< operands[0].name(operands[1...], named); append and pop: operands[0] is a kField
    kCycle,        ///< loop.cycle(operands)
    kFilter,       ///< operands[0] | builtin(operands[1...], named)
    kTest,         ///< operands[0] is builtin(operands[1...])
    kNot,
    kNegate,
    kPlus,
    kAnd,
    kOr,
    kBinary,       ///< operands[0] op operands[1]
    kCompare,      ///< operands[0] comparisons[0] operands[1] comparisons[1] ...
    kConcatenate,  ///< operands[0] ~ operands[1] ~ ...
    kIf,           ///< operands[0] if operands[1] else operands[2], which may be null
  };
  Kind kind;
  int line;
  std::vector<std::unique_ptr<Expression>> operands;
  std::vector<std::pair<std::string, std::unique_ptr<Expression>>> named;
  std::string name;
  Symbol symbol = -1;
  Operator op = Operator::kAdd;
  std::vector<Operator> comparisons;
  Value value;
  const Builtin* builtin = nullptr;
};

/// What `for` and `set` assign to: a name, a field of a namespace, or a tuple of names.
struct Target {
  std::vector<Symbol> symbols;
  std::string field;  ///< of the namespace symbols[0], if not empty
  bool tuple = false;
};

struct Statement {
  enum class Kind {
    kText,      ///< text
    kPrint,     ///< expression
    kIf,        ///< expression, body, otherwise
    kFor,       ///< target in expression, if condition: body, otherwise
    kSet,       ///< target = expression
    kSetBlock,  ///< target = what body prints
    kScope,     ///< body, with assignments that end with it
    kBody,      ///< body, as if it stood here
    kBreak,
    kContinue,
  };
  Kind kind;
  int line;
  MarkedText text;
  std::unique_ptr<Expression> expression, condition;
  Target target;
  std::vector<std::unique_ptr<Statement>> body, otherwise;
};

struct Macro {
  std::string name;
  std::vector<std::pair<Symbol, std::unique_ptr<Expression>>> parameters;  ///< with defaults, or null
  std::vector<std::unique_ptr<Statement>> body;
};

/// A template, understood in full.
struct Program {
  std::vector<std::string> names;  ///< by Symbol
  std::vector<std::unique_ptr<Statement>> body;
  std::vector<std::unique_ptr<Macro>> macros;  ///< by Symbol; null for names that are none
};

}  // namespace flash_mla::text::jinja
